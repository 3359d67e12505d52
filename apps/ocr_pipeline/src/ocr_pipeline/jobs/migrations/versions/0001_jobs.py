"""Jobs, their photos, and who works."""

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
        "jobs",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("feeder", sa.String(128), nullable=False),
        sa.Column("share", sa.String(64), nullable=False),
        sa.Column("idempotency", sa.String(64)),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("duplicates", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("finished_at", sa.Float(53)),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("owner", "idempotency", name="uq_jobs_owner"),
    )
    op.create_index("ix_jobs_finished", "jobs", ["finished_at"])
    op.create_table(
        "items",
        sa.Column("id", row_id, nullable=False, autoincrement=True),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("pole_id", sa.String(128), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("image_hash", sa.String(64), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("not_before", sa.Float(53), nullable=False, server_default="0"),
        sa.Column("lease_owner", sa.String(64)),
        sa.Column("lease_until", sa.Float(53)),
        sa.Column("heartbeat_at", sa.Float(53)),
        sa.Column("started_at", sa.Float(53)),
        sa.Column("finished_at", sa.Float(53)),
        sa.Column("result", sa.Text),
        sa.Column("error_code", sa.String(32)),
        sa.Column("error", sa.String(500)),
        sa.Column("error_status", sa.Integer),
        sa.PrimaryKeyConstraint("id", name="pk_items"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_items_job_id", ondelete="CASCADE"),
        sa.UniqueConstraint("job_id", "pole_id", "image_hash", name="uq_items_job_id"),
    )
    op.create_index("ix_items_order", "items", ["state", "priority", "id"])
    op.create_index("ix_items_job", "items", ["job_id", "state"])
    op.create_index("ix_items_finished", "items", ["finished_at"])
    op.create_table(
        "photos",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_photos"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("seen_at", sa.Float(53), nullable=False),
        sa.Column("ready", sa.Boolean, nullable=False),
        sa.Column("problem", sa.String(500), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("workers", "photos", "items", "jobs"):
        op.drop_table(table)
