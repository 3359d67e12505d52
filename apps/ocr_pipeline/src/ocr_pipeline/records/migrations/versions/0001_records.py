"""The register, the readings, the detector's classes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

row_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "records",
        sa.Column("pole_id", sa.String(128), nullable=False),
        sa.Column("feeder", sa.String(128), nullable=False),
        sa.Column("potencia_kva", sa.Float(53)),
        sa.Column("fabricante", sa.String(64)),
        sa.Column("numero_serie", sa.String(64)),
        sa.Column("data_fabricacao", sa.String(10)),
        sa.Column("elo_fusivel", sa.String(64)),
        sa.Column("tensao_primaria", sa.Float(53)),
        sa.Column("tensao_secundaria", sa.String(64)),
        sa.Column("fases", sa.Integer),
        sa.Column("autoprotegido", sa.Boolean),
        sa.Column("patrimonio", sa.String(64)),
        sa.Column("matricula", sa.String(64)),
        sa.PrimaryKeyConstraint("pole_id", name="pk_records"),
    )
    op.create_index("ix_records_feeder", "records", ["feeder"])
    op.create_table(
        "readings",
        sa.Column("id", row_id, nullable=False, autoincrement=True),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("feeder", sa.String(128), nullable=False),
        sa.Column("pole_id", sa.String(128), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("image_sha256", sa.String(64), nullable=False),
        sa.Column("reading", sa.Text, nullable=False),
        sa.Column("needs_review", sa.Boolean, nullable=False),
        sa.Column("crop", sa.LargeBinary),
        sa.Column("read_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_readings"),
        sa.UniqueConstraint("job_id", "pole_id", "image_sha256", name="uq_readings_job_id"),
    )
    op.create_index("ix_readings_feeder", "readings", ["feeder", "job_id"])
    op.create_table(
        "tags",
        sa.Column("reading_id", row_id, nullable=False),
        sa.Column("tag", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("reading_id", "tag", name="pk_tags"),
        sa.ForeignKeyConstraint(
            ["reading_id"], ["readings.id"], name="fk_tags_reading_id", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("tags", "readings", "records"):
        op.drop_table(table)
