"""From a model and its scores (or a keep-list file) to the keep-lists of every layer.

First the counts, then the experts, then the MTP layers, then the check that no pruned expert beats
a retained one. Of the model's weights only the routers of MTP layers without scores are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.errors import ConfigError, InputError, UsageError


def routing_facts(anatomy: Anatomy) -> RoutingFacts:
    """What the selection must know of a model's routers, in its largest layers."""
    return RoutingFacts(
        num_experts=anatomy.num_experts,
        top_k=anatomy.top_k,
        n_group=anatomy.n_group,
        topk_group=anatomy.topk_group,
        group_score_top=anatomy.family.group_score_top,
    )


def main_facts(anatomy: Anatomy) -> dict[int, RoutingFacts]:
    """Main layer → what the selection must know of its own router."""
    facts = routing_facts(anatomy)
    return {layer.index: facts.of_layer(layer.num_experts) for layer in anatomy.main_layers}


@dataclass(frozen=True, slots=True)
class RoutingFacts:
    """What the router of a model needs to stay able to choose.

    num_experts: routed experts per MoE layer; top_k: experts chosen per token.
    n_group, topk_group: groups the experts are split into, and how many of them a token may
    use; group g owns the ids [g * num_experts / n_group, (g + 1) * num_experts / n_group).
    group_score_top: how many of its best experts a group is scored by.
    Raises ConfigError where the numbers contradict each other.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_score_top: int = 1

    def __post_init__(self) -> None:
        counts = (self.num_experts, self.top_k, self.n_group, self.topk_group)
        if min(counts) < 1:
            problem = "experts, top-k, n_group and topk_group are {}, {}, {}, {}; all must be >= 1"
            raise ConfigError("config.json", problem.format(*counts))
        if self.top_k > self.num_experts:
            problem = f"top-k is {self.top_k}, more than the {self.num_experts} experts"
            raise ConfigError("config.json", problem)
        if self.num_experts % self.n_group:
            problem = f"{self.num_experts} experts do not divide into {self.n_group} equal groups"
            raise ConfigError("config.json", problem)
        if self.topk_group > self.n_group:
            problem = f"topk_group is {self.topk_group}, more than the {self.n_group} groups"
            raise ConfigError("config.json", problem)

    def of_layer(self, num_experts: int) -> RoutingFacts:
        """The same for a layer of another number of experts, of which a token gets no more."""
        return replace(self, num_experts=num_experts, top_k=min(self.top_k, num_experts))


def check_kept(
    kept: int, facts: RoutingFacts, where: str, error: type[InputError] = UsageError
) -> None:
    """Raise `error`, naming `where`, unless `kept` experts per layer prune something and leave
    the router enough to choose from."""
    if kept >= facts.num_experts:
        problem = f"keeping {kept} of {facts.num_experts} experts prunes nothing"
        raise error(where, problem, f"keep fewer than {facts.num_experts}")
    check_routing(kept, facts, where, error)


def check_routing(
    kept: int, facts: RoutingFacts, where: str, error: type[InputError] = UsageError
) -> None:
    """Raise `error`, naming `where`, unless a router can choose from `kept` experts."""
    problems = group_problem(kept, facts) if kept % facts.n_group else None
    problems = problems or _routing_problem(kept, facts)
    if problems:
        raise error(where, *problems)


def fewest_kept(facts: RoutingFacts) -> int:
    """The smallest kept count that `check_routing` lets pass."""
    return max(-(-facts.top_k // facts.topk_group), facts.group_score_top) * facts.n_group


def group_problem(kept: int, facts: RoutingFacts) -> tuple[str, str]:
    """(problem, remedy) of a count that is not the same number in every group."""
    below = kept // facts.n_group * facts.n_group
    near = [count for count in (below, below + facts.n_group) if 0 < count < facts.num_experts]
    problem = f"{kept} kept experts do not divide into the {facts.n_group} groups of the router"
    return problem, f"keep {' or '.join(map(str, near))}" if near else ""


def _routing_problem(kept: int, facts: RoutingFacts) -> tuple[str, str] | None:
    """(problem, remedy) where the router could not choose from `kept` experts."""
    if kept < facts.top_k:
        problem = f"{kept} kept experts are fewer than the {facts.top_k} each token is sent to"
        return problem, f"keep at least {facts.top_k}"
    per_group = kept // facts.n_group
    reachable = facts.topk_group * per_group
    if reachable < facts.top_k:
        groups = f"{facts.topk_group} of {facts.n_group} groups with {per_group} experts each"
        need = -(-facts.top_k // facts.topk_group) * facts.n_group
        problem = f"a token may use {groups}, {reachable} in all, and needs {facts.top_k}"
        return problem, f"keep at least {need}"
    if per_group < facts.group_score_top:
        problem = f"{per_group} experts per group, and the router scores a group by its best"
        need = facts.group_score_top * facts.n_group
        return f"{problem} {facts.group_score_top}", f"keep at least {need}"
    return None
