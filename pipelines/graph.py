"""The stage graph: which stages there are, in what order, and under which keys.

A stage's key is the hash of its kind, version, resolved configuration and its upstream stages' keys. Its output is the
artifact `{store}/artifacts/{kind}/{key}/`; a committed artifact is never made again. A changed setting changes the
key of its stage and of all that follow, and of nothing else.

Keys are pure functions of the stages and of their generations (pipelines/generations.py): they are known before
anything runs. Rival runs of one stage write separate attempts of the same artifact, and whichever commits first is what
both go on with.
"""

from collections.abc import Mapping, Sequence

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.stage import GraphError, Stage, kind_of
from pipelines.stage_key import stage_key


class Graph:
    """Stages in an order that respects their dependencies, and among free ones the order given.

    `generations`: how often a stage was made anew under what would be its key, by that key. Raises GraphError.
    """

    def __init__(self, stages: Sequence[Stage], generations: Mapping[str, int] | None = None) -> None:
        self.stages = {stage.name: stage for stage in _topological(stages)}
        self.generations = dict(generations or {})
        self.first_keys: dict[str, str] = {}
        """A stage's key before it was made anew; the same as in `keys` for almost all."""
        self.keys: dict[str, str] = {}
        for stage in self.stages.values():
            upstream = {kind_of(name): self.keys[name] for name in stage.upstream}
            first = self.first_keys[stage.name] = "" if stage.always else stage_key(stage, upstream)
            generation = self.generations.get(first, 0)
            self.keys[stage.name] = stage_key(stage, upstream, generation) if generation else first

    def check_forced(self, name: str, until: str | None = None, from_stage: str | None = None) -> None:
        """Raises GraphError unless the stage is selected, and can be made anew."""
        if name not in self.stages:
            raise GraphError(f"there is no stage {name!r} to force; choose one of {', '.join(self.stages)}")
        if self.stages[name].always:
            raise GraphError(f"stage {name!r} always runs; leave out --force {name}")
        if self.stages[name] not in self.selected(until, from_stage):
            raise GraphError(
                f"stage {name!r} is not among those to run; leave out --force {name}, or --from and --until"
            )

    def artifact(self, store: Store, name: str) -> Artifact:
        """Where a stage's output lies, committed or not."""
        return Artifact(store.child("artifacts", kind_of(name), self.keys[name]))

    def selected(self, until: str | None = None, from_stage: str | None = None) -> list[Stage]:
        """The stages to run, in order: all; or `until` and what it needs; or of these `from_stage` and what follows it.

        Raises GraphError for an unknown stage, and if none is left.
        """
        for name in (until, from_stage):
            if name is not None and name not in self.stages:
                raise GraphError(f"there is no stage {name!r}; choose one of {', '.join(self.stages)}")
        wanted = set(self.stages) if until is None else {until} | self.upstream_of(until)
        if from_stage is not None:
            wanted &= {from_stage} | self.downstream_of(from_stage)
            if not wanted:
                raise GraphError(
                    f"stage {until!r} does not follow {from_stage!r}; choose a later --until, or no --from"
                )
        return [stage for stage in self.stages.values() if stage.name in wanted]

    def upstream_of(self, name: str) -> set[str]:
        """All that a stage needs, at first or second hand."""
        found = {name}
        for stage in reversed(self.stages.values()):
            if stage.name in found:
                found.update(stage.upstream)
        return found - {name}

    def downstream_of(self, name: str) -> set[str]:
        """All that needs a stage, at first or second hand."""
        found = {name}
        for stage in self.stages.values():
            if found & set(stage.upstream):
                found.add(stage.name)
        return found - {name}


def _topological(stages: Sequence[Stage]) -> list[Stage]:
    by_name: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in by_name:
            raise GraphError(f"two stages are named {stage.name!r}; rename one")
        by_name[stage.name] = stage
    for stage in stages:
        if len({kind_of(name) for name in stage.upstream}) < len(stage.upstream):
            raise GraphError(f"stage {stage.name!r} follows two stages of one kind ({', '.join(stage.upstream)})")
        for name in stage.upstream:
            if name not in by_name:
                raise GraphError(f"stage {stage.name!r} needs {name!r}, which is not in the graph")
            if by_name[name].always:
                raise GraphError(f"stage {stage.name!r} needs {name!r}, which always runs and leaves no artifact")
    ordered: dict[str, Stage] = {}
    while len(ordered) < len(by_name):
        ready = [s for s in stages if s.name not in ordered and all(name in ordered for name in s.upstream)]
        if not ready:
            raise GraphError(f"the stages {', '.join(n for n in by_name if n not in ordered)} wait for each other")
        ordered[ready[0].name] = ready[0]
    return list(ordered.values())
