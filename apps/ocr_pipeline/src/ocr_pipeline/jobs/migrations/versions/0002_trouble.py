"""Since when the box has kept a photo from being read: what bounds its wait, instead of attempts."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("items", sa.Column("trouble_since", sa.Float(53)))


def downgrade() -> None:
    """Drop it."""
    with op.batch_alter_table("items") as items:
        items.drop_column("trouble_since")
