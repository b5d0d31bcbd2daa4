"""Says what to do where a training step does not fit into the memory."""

from sr_jax import UserError
from sr_jax.machine.memory import asked_for, ran_out
from sr_jax.training.checks import largest_patch
from sr_jax.training.stage import Stage


def explained(error: Exception, stage: Stage) -> Exception:
  """Makes an error of one line of one that says that memory ran out; others are returned as is.

  Args:
    error: what the step, or what prepares it, raised.
    stage: the stage that trained.
  """
  if not ran_out(error):
    return error
  config, prefix = stage.config, f"--config.{stage.prefix}"
  device = stage.mesh.devices.flat[0]
  where = "the memory" if device.platform == "cpu" else f"the memory of a {device.device_kind}"
  batch, parts = config.data.batch_size, config.optimizer.accumulate_steps
  remedies = []
  if batch % (2 * parts * stage.mesh.size) == 0:
    remedies.append(f"{prefix}optimizer.accumulate_steps={2 * parts} (the same batch, in parts)")
  if config.generator.kwargs.get("remat") is False:
    remedies.append(f"{prefix}generator.kwargs.remat=True (recomputes instead of keeping)")
  if batch % (2 * parts * stage.mesh.size) == 0:
    remedies.append(f"{prefix}data.batch_size={batch // 2} (changes the recipe)")
  # A checkpoint's discriminator is of one size of crops, but for the U-Net.
  free = not config.adversarial.weight or config.discriminator.name == "unet" or not stage.step
  if free and (side := largest_patch(config, 2 * config.data.hr_patch // 3)):
    remedies.append(f"{prefix}data.hr_patch={side} (changes the recipe)")
  crops = f"{batch} crops of {config.data.hr_patch}x{config.data.hr_patch}"
  return UserError(
    f"a step of {crops} does not fit into {where}{asked_for(error)}; try "
    f"{', or '.join(remedies[:3]) or 'a smaller network'}; the same command then goes on from the "
    "last checkpoint"
  )
