"""The table of campaigns. A new one is an entry: a strategy that makes inputs, and a target that reads one."""

from tests.fuzz import checkpoints, folders, models, rows, settings
from tests.fuzz.runner import Campaign

CAMPAIGNS: dict[str, Campaign] = {
    "settings": settings.SETTINGS,
    "rows": rows.ROWS,
    "parquet": rows.PARQUET,
    "safetensors": models.SAFETENSORS,
    "config": models.CONFIG,
    "tokenizer": models.TOKENIZER,
    "folder": folders.FOLDER,
    "damage": checkpoints.DAMAGE,
    "payload": checkpoints.PAYLOAD,
}
