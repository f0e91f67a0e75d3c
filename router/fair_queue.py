"""Who is next: by priority, then by what each tenant has had of the cluster, then by arrival.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant pays for the tokens
that it is served, and of those that wait the one that paid least is next. Who begins to wait is lifted to the least that those
who wait already have paid, so that nobody saves up and nobody goes before all that were there. What tenants have paid that wait
for nothing does not matter. A tenant that asks for little is served at once, whatever others ask for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

EntryT = TypeVar("EntryT")


@dataclass(eq=False, slots=True)
class Waiting(Generic[EntryT]):
    """`cost` is in tokens; a lower `priority` is served first, as in vLLM."""

    entry: EntryT
    tenant: str
    priority: int
    cost: int


@dataclass(slots=True)
class _Tenant:
    # Tokens paid for, over its weight.
    paid: float = 0.0
    weight: float = 1.0
    num_running: int = 0
    # By priority, oldest first.
    waiting: dict[int, deque[Waiting[object]]] = field(default_factory=dict)
    # Of all that waits, by priority.
    waiting_cost: dict[int, int] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def paid_before(self, priority: int) -> float:
        """Once all has been served that it has waiting and that goes before this priority."""
        return self.paid + sum(cost for level, cost in self.waiting_cost.items() if level < priority) / self.weight


class FairQueue(Generic[EntryT]):
    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        # What the tenant had paid that was the last to wait at some priority: who comes when nobody waits there starts from
        # it. Never falls.
        self._floor = 0.0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, waiting: Waiting[EntryT], weight: float = 1.0) -> None:
        tenant = self._tenants.setdefault(waiting.tenant, _Tenant(self._floor))
        if waiting.priority not in tenant.waiting:
            tenant.paid = max(tenant.paid, self._start(waiting.priority))
        tenant.weight = weight
        tenant.waiting.setdefault(waiting.priority, deque()).append(waiting)  # type: ignore[arg-type]
        tenant.waiting_cost[waiting.priority] = tenant.waiting_cost.get(waiting.priority, 0) + waiting.cost
        self._num_waiting += 1

    def pop(self) -> Waiting[EntryT]:
        """The next one, whose tenant pays its cost and has one more running. Raises IndexError when nobody waits."""
        if not self._num_waiting:
            raise IndexError("nobody waits")
        priority = min(min(tenant.waiting) for tenant in self._tenants.values() if tenant.waiting)
        # Who was lifted comes out even with another; the one that has less running is the one that comes anew.
        tenant = min(self._waiting_at(priority), key=lambda tenant: (tenant.paid, tenant.num_running))
        waiting = tenant.waiting[priority][0]
        tenant.num_running += 1
        tenant.paid += waiting.cost / tenant.weight
        self._take(tenant, waiting)
        return waiting  # type: ignore[return-value]

    def remove(self, waiting: Waiting[EntryT]) -> None:
        """One that waits no longer, and pays nothing."""
        tenant = self._tenants[waiting.tenant]
        self._take(tenant, waiting)  # type: ignore[arg-type]
        self._forget_if_idle(waiting.tenant)

    def _take(self, tenant: _Tenant, waiting: Waiting[object]) -> None:
        line = tenant.waiting[waiting.priority]
        line.remove(waiting)
        tenant.waiting_cost[waiting.priority] -= waiting.cost
        if not line:
            del tenant.waiting[waiting.priority], tenant.waiting_cost[waiting.priority]
        self._num_waiting -= 1
        if not self._waiting_at(waiting.priority):
            self._floor = max(self._floor, tenant.paid)

    def pay(self, tenant: str, tokens: float) -> None:
        """For what a running entry of it was served beyond its cost."""
        account = self._tenants[tenant]
        account.paid += tokens / account.weight

    def end(self, tenant: str) -> None:
        """One of its running entries is over."""
        self._tenants[tenant].num_running -= 1
        self._forget_if_idle(tenant)

    def cost_ahead(self, tenant: str, priority: int) -> float:
        """Tokens that would be served before an entry that came now, if no others came: what goes before by priority; what its
        own tenant has waiting; and of each other tenant what it may have until it has paid as much, up to a last entry."""
        own = self._tenants.get(tenant) or _Tenant(self._floor)
        ahead = float(
            sum(cost for one in self._tenants.values() for level, cost in one.waiting_cost.items() if level < priority)
        )
        own_waiting = own.waiting_cost.get(priority, 0)
        lifted = 0.0 if own_waiting else max(self._start(priority) - own.paid, 0.0)
        turn = own.paid_before(priority) + lifted + own_waiting / own.weight
        for other in self._waiting_at(priority):
            if other is not own:
                ahead += min(other.waiting_cost[priority], max(turn - other.paid_before(priority), 0.0) * other.weight)
        return ahead + own_waiting

    def _start(self, priority: int) -> float:
        """What who begins to wait at this priority has paid at least. Never falls."""
        return min((tenant.paid for tenant in self._waiting_at(priority)), default=self._floor)

    def _waiting_at(self, priority: int) -> list[_Tenant]:
        return [tenant for tenant in self._tenants.values() if priority in tenant.waiting]

    def _forget_if_idle(self, name: str) -> None:
        """What it paid counts no more, once the others have paid as much, or nobody is here."""
        tenant = self._tenants[name]
        if not tenant.is_active and tenant.paid <= self._floor:
            del self._tenants[name]
        if not any(tenant.is_active for tenant in self._tenants.values()):
            self._floor = max(self._floor, *(other.paid for other in self._tenants.values()), 0.0)
            self._tenants.clear()
