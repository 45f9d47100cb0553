"""The engines that answer: releases of a model, pools of engines, and who of them is asked.

releases.py   public model -> release: stable, canary, shadow, fallback
members.py    one engine as it stands: ready, in flight, left alone, draining
pools.py      engines that share a load: the choice among them, and how often a request may be tried again
probes.py     looks at engines, and completions of one token while nobody asks them
journey.py    one request's way from engine to engine, until one begins to answer
layout.py     the pools and releases that the settings describe, and the watch over their engines
fleet.py      all of it together: what app.chat talks to
"""

from __future__ import annotations

from app.fleet.fleet import EngineView, Fleet, Shadowed
from app.fleet.journey import Trail
from app.fleet.members import Caller, State, Supervised
from app.fleet.pools import affinity_of
from app.fleet.releases import Release

__all__ = ["Caller", "EngineView", "Fleet", "Release", "Shadowed", "State", "Supervised", "Trail", "affinity_of"]
