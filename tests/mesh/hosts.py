"""One of two hosts of two devices each: hosts.py PORT NUMBER MODEL. `test_mesh.py` starts both."""

import json
import sys

import jax

port, number, model = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))

import s3d_jax  # noqa: E402  jax must know the hosts before anything uses it

found = []
lm = s3d_jax.load(model, mesh="data=2,model=2")
for options in (dict(method="ar"), {}, dict(temperature=0.9, seed=1)):
    results = lm.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, **options)
    found.append([result.tokens for result in results])
try:
    s3d_jax.load(model, mesh="model=2")
except s3d_jax.DeviceError as error:
    found.append(str(error))
print(json.dumps(found))
