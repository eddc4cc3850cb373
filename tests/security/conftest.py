"""A bus whose parties have keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from elesh.bus import Bus
from elesh.security import new_key
from elesh.settings import BusSettings


@pytest.fixture
def signed(redis_url: str, partition: str, tmp_path: Path) -> Callable[..., Any]:
    """Runs a scenario on a bus whose keyring has one key, or on one without a keyring."""
    file = tmp_path / "ring.yaml"
    file.write_text(yaml.safe_dump({"sign_with": "k", "keys": [new_key("hmac-sha256", "k")]}))

    def run(scenario: Callable[[Bus], Awaitable[Any]], *, keyring: bool = True) -> Any:
        async def connected() -> Any:
            security = {"keyring": str(file)} if keyring else {}
            bus = await Bus.connect(redis_url, BusSettings(partition=partition, security=security))
            try:
                return await scenario(bus)
            finally:
                await bus.close()

        return asyncio.run(connected())

    return run
