"""`python -m launch plan`: whether a run fits a cluster, how fast it would be and what it would cost."""

import json
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig
    from tlite_jax.plan.cost import Cost
    from tlite_jax.plan.program import Program
    from tlite_jax.plan.search import Candidate, Words
    from tlite_jax.plan.topology import Hardware
    from tlite_jax.plan.worker import Failure

EXIT_FAILED = 1
HARDWARE = Path(__file__).resolve().parent.parent / "configs" / "hardware"
MOST_REMEDIES, MORE_NODES = 2, (2, 4, 8)
MOST_FAULTS = 8  # in the line of the error; all are printed above it


def main(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    hardware: Annotated[str, typer.Option(help="A name in configs/hardware, or a YAML file.")] = "a100-80gb",
    nodes: Annotated[int | None, typer.Option(min=1, help="Hosts; default: as many as the mesh takes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    search: Annotated[bool, typer.Option("--search", help="Rank microbatches, remat and meshes.")] = False,
    audit: Annotated[bool, typer.Option("--audit", help="Fail where the program is worse than it should be.")] = False,
    headroom: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the memory to leave free.")] = 0.05,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per device-hour.")] = None,
    allow_cpu: Annotated[
        bool, typer.Option("--allow-cpu", help="Compile for CPU devices where the compiler is absent: an upper bound.")
    ] = False,
) -> None:
    """Say whether a run fits a cluster, how fast it would be and what it would cost, without the cluster.

    Exits with status 1 when it does not fit, or when --audit finds fault.

    Example: python -m launch plan configs/tlite_8b_stage1.yaml --hardware a100-80gb --nodes 12
    """
    from tlite_jax.config_files import load_config
    from tlite_jax.plan.search import check_batch, check_mesh, default_nodes
    from tlite_jax.plan.topology import domain, load_hardware

    run = _with_model(load_config(config, overrides or ()))
    described = load_hardware(hardware, HARDWARE)
    nodes = default_nodes(run, described) if nodes is None else nodes
    num_devices = domain(described, nodes).num_devices
    if not search:
        check_mesh(run, described, nodes)
    check_batch(run, num_devices, 1 if search else run.execution.num_microbatches)
    planner = _Planner(described, nodes, headroom, price, allow_cpu)
    failed = planner.search(run, as_json) if search else planner.plan(run, as_json, audit)
    if failed:
        typer.echo(f"error: {failed}", err=True)
        raise typer.Exit(EXIT_FAILED)


class _Planner:
    """The options of one call. Its methods return why the command fails, or an empty string."""

    def __init__(self, hardware: "Hardware", nodes: int, headroom: float, price: float | None, allow_cpu: bool):
        from tlite_jax.plan.worker import plugin_is_missing

        missing = plugin_is_missing(hardware)
        if missing is not None and not allow_cpu:
            raise UserError(f"{missing}, or pass --allow-cpu for an upper bound")
        self.hardware, self.nodes, self.headroom, self.price = hardware, nodes, headroom, price
        self.on_cpu = hardware.kind == "cpu" or missing is not None

    def plan(self, run: "RunConfig", as_json: bool, audit: bool) -> str:
        """Compiles the config as it is, prints what it finds, and what would make it fit if it does not."""
        from tlite_jax.plan import cost, report, topology
        from tlite_jax.plan.worker import Failure

        (answer,) = self.compile(run, self.nodes, [()])
        if isinstance(answer, Failure):
            return self._not_compiled(run, answer, as_json)
        priced = self.priced(self.nodes, answer, run)
        cluster = topology.domain(self.hardware, self.nodes)
        plan = report.Plan(run, self.hardware, self.nodes, cluster, answer, priced, self.on_cpu, self.price)
        faults = cost.audit(answer, priced, run.execution.remat) if audit else []
        remedies = [] if priced.fit.fits else self.remedies(run, answer)
        if as_json:
            found = [report.candidate_to_json(each) for each in remedies]
            _print_json({**report.to_json(plan), "remedies": found, "audit": faults if audit else None})
        else:
            report.print_plan(plan, report.console_for())
            for fault in faults:
                typer.echo(f"audit: {fault}")
        if not priced.fit.fits:
            faults = [f"{report.shortfall(priced)}; {self._advice(remedies)}", *faults]
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        return "; ".join([*faults[:MOST_FAULTS], *more])

    def search(self, run: "RunConfig", as_json: bool) -> str:
        """Compiles and ranks variants."""
        from tlite_jax.plan import report, search, topology

        cluster = topology.domain(self.hardware, self.nodes)
        attempt, price = partial(self.compile, run, self.nodes), partial(self.priced, self.nodes)
        found, failures = search.search(run, cluster, attempt, price)
        if as_json:
            candidates = [report.candidate_to_json(each) for each in found]
            _print_json({"upper_bound": self.on_cpu, "candidates": candidates, "failures": failures})
        else:
            report.print_search(found, report.console_for())
            if self.on_cpu:
                typer.echo("compiled for CPU devices: memory is an upper bound")
            if found:
                typer.echo(f"the fastest: {' '.join(found[0].words)}")
        for failure in failures:
            typer.echo(f"not compiled: {failure}", err=True)
        return "" if found else f"nothing fits on {self.nodes} nodes; {self._advice(self.on_more_nodes(run))}"

    def compile(
        self, run: "RunConfig", nodes: int, variants: "Sequence[Words]"
    ) -> "Generator[Program | Failure, None, None]":
        """Compiles variants one by one, saying so on stderr."""
        from tlite_jax.plan.worker import Request, compile_variants

        request = Request(config=run, hardware=self.hardware, nodes=nodes, variants=tuple(variants), on_cpu=self.on_cpu)
        answers = compile_variants(request)
        for words in variants:
            with _working(" ".join([f"compiling for {nodes} nodes", *words])):
                answer = next(answers)
            yield answer

    def priced(self, nodes: int, program: "Program", run: "RunConfig") -> "Cost":
        """The cost of a program."""
        from tlite_jax.plan.cost import estimate

        return estimate(program, self.hardware, run, nodes=nodes, headroom=self.headroom, price=self.price)

    def remedies(self, run: "RunConfig", program: "Program | None") -> "list[Candidate]":
        """What would make a run fit, found by compiling: on the same nodes if anything does, else on more."""
        from tlite_jax.plan import search, topology

        num_devices = topology.domain(self.hardware, self.nodes).num_devices
        microbatches = program.num_microbatches if program else run.execution.num_microbatches
        variants = search.remedies(run, num_devices, run.train.batch_size // (num_devices * microbatches))
        attempt, price = partial(self.compile, run, self.nodes), partial(self.priced, self.nodes)
        found = search.first_fits(run, variants, attempt, price, most=MOST_REMEDIES)
        return found or self.on_more_nodes(run)

    def on_more_nodes(self, run: "RunConfig") -> "list[Candidate]":
        """The fewest times more nodes that a run fits on, sharded over all of them."""
        from tlite_jax.plan import search, topology

        for times in MORE_NODES:
            nodes = self.nodes * times
            num_devices = topology.domain(self.hardware, nodes).num_devices
            variants = [search.remedy_on(run, num_devices)]
            attempt, price = partial(self.compile, run, nodes), partial(self.priced, nodes)
            if found := search.first_fits(run, variants, attempt, price, most=1):
                return found
        return []

    def _advice(self, remedies: "Sequence[Candidate]") -> str:
        if not remedies:
            return (
                f"nothing that was tried fits, up to {self.nodes * MORE_NODES[-1]} nodes; use devices with more memory"
            )
        per_node = self.hardware.devices_per_node
        ways = []
        for each in remedies:
            nodes = each.program.num_devices // per_node
            where = f"--nodes {nodes} " if nodes != self.nodes else ""
            ways.append(
                f"{where}{' '.join(each.words)} ({each.cost.tokens_per_second_per_device:,.0f} tokens/s/device)"
            )
        return f"fits with {', or with '.join(ways)}"

    def _not_compiled(self, run: "RunConfig", failure: "Failure", as_json: bool) -> str:
        from tlite_jax.plan.report import candidate_to_json

        if failure.is_mistake:
            raise UserError(failure.message)
        if not failure.is_memory:
            return failure.message
        remedies = self.remedies(run, None)
        if as_json:
            found = [candidate_to_json(each) for each in remedies]
            _print_json({"fits": False, "error": failure.message, "remedies": found})
        return f"does not fit: {failure.message}; {self._advice(remedies)}"


def _with_model(run: "RunConfig") -> "RunConfig":
    """The config with the shape of the checkpoint that it starts from, where it leaves that out."""
    if run.model is not None:
        return run
    from tlite_jax.checkpoint import find

    assert run.init_from is not None
    try:
        model = find(run.init_from.path, run.init_from.step).meta.model
    except UserError as error:
        raise UserError(
            f"model is null, and so that of init_from, but {error}; import it, or write model out"
        ) from error
    return run.model_copy(update={"model": model})


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def _working(what: str) -> AbstractContextManager[Any]:
    """A spinner on a terminal, a line elsewhere; on stderr."""
    from tlite_jax.plan.report import console_for

    console = console_for(stderr=True)
    if console.is_terminal:
        return console.status(what)
    console.print(what, highlight=False, markup=False)
    return nullcontext()
