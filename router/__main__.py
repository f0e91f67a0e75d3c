"""`python -m router`: one router; its settings (segue.config.RouterSettings) come from the environment, SEGUE_<NAME>."""

import sys

from router.app import run_router
from segue.config import RouterSettings
from segue.logs import set_up_logging
from segue.runtime import run_process


async def main() -> None:
    settings = RouterSettings.load()
    set_up_logging(settings.log_format, router_id=settings.router_id)
    await run_router(settings)


if __name__ == "__main__":
    sys.exit(run_process(main))
