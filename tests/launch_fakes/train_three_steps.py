"""Trains 3 steps over all processes that SLURM's variables announce; prints what each one saw."""

import jax

jax.distributed.initialize()  # no arguments: everything is in SLURM_*

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

mesh = jax.make_mesh((jax.device_count(),), ("batch",))
rank = jax.process_index()
# Rank r holds the examples x = r + 1 with y = 3 x; one parameter, squared error.
x = jax.make_array_from_process_local_data(
  NamedSharding(mesh, P("batch")), np.full((4,), rank + 1, np.float32)
)
w = jax.device_put(np.float32(0), NamedSharding(mesh, P()))


@jax.jit
def step(w, x):
  loss, gradient = jax.value_and_grad(lambda w: jnp.mean((w * x - 3 * x) ** 2))(w)
  return w - 0.1 * gradient, loss


losses = []
for _ in range(3):
  w, loss = step(w, x)
  losses.append(f"{float(loss):.6f}")
print(f"rank={rank} processes={jax.process_count()} losses={','.join(losses)}", flush=True)
