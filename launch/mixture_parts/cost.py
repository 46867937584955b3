"""How long a number of tokens takes, and what it costs."""

from dataclasses import dataclass
from pathlib import Path

from tlite_jax.errors import UserError


@dataclass(frozen=True)
class Cost:
    """Devices, what each of them does in a second, and dollars for an hour of one; None: not known."""

    tokens_per_second: float
    devices: int
    price: float | None

    def days(self, tokens: int) -> float:
        """Days that all devices need."""
        return tokens / (self.tokens_per_second * self.devices) / 86_400

    def dollars(self, tokens: int) -> float | None:
        """Dollars for those days."""
        return None if self.price is None else tokens / self.tokens_per_second / 3600 * self.price


def make_cost(
    tokens_per_second: float | None,
    devices: int | None,
    price: float | None,
    hardware: str | None,
    nodes: int,
    directory: Path,
) -> Cost | None:
    """Puts the command's options together; None when no throughput is given.

    Raises:
      UserError: options that lack another one, or hardware that is not described.
    """
    if tokens_per_second is None:
        if devices or price is not None or hardware:
            raise UserError("--devices, --price and --hardware need --tokens-per-second, that of one device")
        return None
    if hardware is not None:
        from tlite_jax.plan.topology import load_hardware

        described = load_hardware(hardware, directory)
        devices = devices or described.devices_per_node * nodes
        if price is None and described.price is not None:
            price = described.price.dollars_per_device_hour
    if devices is None:
        raise UserError("--tokens-per-second is that of one device: give --devices, or --hardware and --nodes")
    return Cost(tokens_per_second, devices, price)
