"""How old a job's readings are, without a look at its pictures."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index."""
    op.create_index("ix_readings_age", "readings", ["job_id", "read_at"])


def downgrade() -> None:
    """Drop it."""
    op.drop_index("ix_readings_age", "readings")
