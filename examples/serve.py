"""Serving as with vLLM's engine: submit and stream requests that come and go, each with a prefix of its own.

``python examples/serve.py`` makes a store of three prefixes and serves eight requests of two tenants. A prefix takes
the place of a LoRA adapter: any mix of them runs in the same decode steps.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import prefixfast
from prefixfast.demo import BASE

STORE = Path("serve-store")
PLACES = {"norvale": ("Lumira", "Norvale"), "tarnfield": ("Melina", "Tarnfield"), "brimwick": ("Tashana", "Brimwick")}
PROMPT = "Have you tried what"


async def client(engine: prefixfast.Engine, number: int, name: str) -> str:
    """One client's request, which waits without blocking the others."""
    result = await engine.agenerate(PROMPT, name, max_new_tokens=5, tenant=f"tenant {number % 2}")
    return f"client {number}, {name}: {PROMPT}{result.text}"


async def serve(engine: prefixfast.Engine) -> None:
    """Run the requests of many clients at once, and stream one text."""
    names = [*PLACES, *PLACES]
    for line in await asyncio.gather(*(client(engine, i, name) for i, name in enumerate(names))):
        print(line)
    pieces = [piece async for piece in engine.astream(PROMPT, "norvale", max_new_tokens=5)]
    print(f"streamed in {len(pieces)} pieces: {PROMPT}{''.join(pieces)}")


def main() -> None:
    """Make the prefixes, start an engine, submit, stream, and look at its counters."""
    with prefixfast.load(BASE, dtype="float32") as base:
        # 1. Prefixes by name. Here each holds the keys and values of a text, without training.
        store = prefixfast.PrefixStore(STORE)
        for name, (cook, town) in PLACES.items():
            store.put(name, prefixfast.Prefix.from_text(base, f"The cook is called {cook}. The town is {town}. "))

        # 2. The engine loads prefixes when requests name them.
        with prefixfast.Engine(base, store=store, max_num_seqs=8) as engine:
            asyncio.run(serve(engine))

            # 3. Tickets for code without coroutines: priority, deadline, cancellation.
            urgent = engine.submit(PROMPT, "brimwick", max_new_tokens=5, priority=1, timeout=60)
            unwanted = engine.submit(PROMPT, max_new_tokens=400)
            unwanted.cancel()
            print(f"urgent: {PROMPT}{urgent.result().text}")
            print(f"unwanted: {unwanted.result().finish_reason}")
            stats = engine.stats()
            print(f"{stats['loads']} prefixes loaded, {stats['decode_steps']} decode steps")


if __name__ == "__main__":
    main()
