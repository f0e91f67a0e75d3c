"""`python -m router`: one router; its settings (segue.config.RouterSettings) come from the environment, SEGUE_<NAME>."""

import sys

from router.app import run_router
from segue.config import RouterSettings
from segue.runtime import run_process


async def main() -> None:
    await run_router(RouterSettings.load())


if __name__ == "__main__":
    sys.exit(run_process(main))
