"""Who is next: by priority, then by what each tenant has had of the cluster, then by arrival.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant pays for the tokens
that it is served, and of those that wait the one that paid least is next. Who comes (back) from having nothing to do is lifted
to what the others have paid, so that nobody saves up. A tenant that asks for little is served at once, whatever others ask for.
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


class FairQueue(Generic[EntryT]):
    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        # What the tenant had paid that was served last: who comes when nobody is here starts from it.
        self._floor = 0.0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, waiting: Waiting[EntryT], weight: float = 1.0) -> None:
        tenant = self._tenants.setdefault(waiting.tenant, _Tenant(self._floor))
        if not tenant.is_active:
            tenant.paid = max(tenant.paid, min((other.paid for other in self._active()), default=self._floor))
        tenant.weight = weight
        tenant.waiting.setdefault(waiting.priority, deque()).append(waiting)  # type: ignore[arg-type]
        tenant.waiting_cost[waiting.priority] = tenant.waiting_cost.get(waiting.priority, 0) + waiting.cost
        self._num_waiting += 1

    def pop(self) -> Waiting[EntryT]:
        """The next one, whose tenant pays its cost and has one more running. Raises IndexError when nobody waits."""
        if not self._num_waiting:
            raise IndexError("nobody waits")
        priority = min(min(tenant.waiting) for tenant in self._tenants.values() if tenant.waiting)
        tenant = min(
            (tenant for tenant in self._tenants.values() if priority in tenant.waiting), key=lambda tenant: tenant.paid
        )
        waiting = tenant.waiting[priority][0]
        self._take(tenant, waiting)
        tenant.num_running += 1
        self._floor = tenant.paid
        tenant.paid += waiting.cost / tenant.weight
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

    def pay(self, tenant: str, tokens: float) -> None:
        """For what a running entry of it was served beyond its cost."""
        account = self._tenants[tenant]
        account.paid += tokens / account.weight

    def end(self, tenant: str) -> None:
        """One of its running entries is over."""
        self._tenants[tenant].num_running -= 1
        self._forget_if_idle(tenant)

    def cost_ahead(self, tenant: str, priority: int, cost: int) -> float:
        """Tokens that would be served before an entry that came now, if no others came: what goes before by priority; what its
        own tenant has waiting; and of each other tenant what it may have until it has paid as much."""
        own = self._tenants.get(tenant, _Tenant(self._floor))
        own_waiting = own.waiting_cost.get(priority, 0)
        paid = own.paid
        if not own.is_active:
            paid = max(paid, min((other.paid for other in self._active()), default=self._floor))
        ahead = float(own_waiting)
        for name, other in self._tenants.items():
            ahead += sum(waiting for level, waiting in other.waiting_cost.items() if level < priority)
            if name != tenant:
                turn = max(paid - other.paid, 0.0) + (own_waiting + cost) / own.weight
                ahead += min(other.waiting_cost.get(priority, 0), turn * other.weight)
        return ahead

    def _active(self) -> list[_Tenant]:
        return [tenant for tenant in self._tenants.values() if tenant.is_active]

    def _forget_if_idle(self, name: str) -> None:
        """What it paid counts no more, once the others have paid as much, or nobody is here."""
        tenant = self._tenants[name]
        if not tenant.is_active and tenant.paid <= self._floor:
            del self._tenants[name]
        if not self._active():
            self._floor = max((other.paid for other in self._tenants.values()), default=self._floor)
            self._tenants.clear()
