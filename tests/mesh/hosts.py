"""One of two hosts of two devices each: hosts.py PORT NUMBER FOLDER. `test_mesh.py` starts both.

The first pair of processes trains until it is killed. The second pair resumes, and generates.
"""

import json
import sys
from pathlib import Path

import jax

port, number, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, number)

import s3d_jax  # noqa: E402  jax must know the hosts before anything uses it
from s3d_jax.mesh import by_first_host, told_by_first_host  # noqa: E402
from s3d_jax.nn.sharding import on_host  # noqa: E402
from tests.mesh.tiny_run import train  # noqa: E402

MESH = "data=2,model=2"
resume = (folder / "run/metrics.jsonl").exists()
tree = train(folder / "model", folder / "run", MESH, resume=resume, hangs_at=None if resume else 7)
assert told_by_first_host({"number": number}) == {"number": 0}
assert by_first_host(lambda: "done") == ("done" if number == 0 else None)


def fails():
    raise s3d_jax.InputError(f"no text on host {number}")


try:  # neither waits for the other
    by_first_host(fails)
except s3d_jax.S3DError as error:
    expected = "no text on host 0" if number == 0 else "the first host stopped: no text on host 0"
    assert str(error) == expected, error
else:
    raise AssertionError("nothing was raised")

found = []
lm = s3d_jax.load(folder / "model", mesh=MESH)
for options in (dict(method="ar"), {}, dict(temperature=0.9, seed=1)):
    results = lm.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, **options)
    found.append([result.tokens for result in results])
try:
    s3d_jax.load(folder / "model", mesh="model=2")
except s3d_jax.DeviceError as error:
    found.append(str(error))
found.append(on_host(tree["draft"].bridges["final_norm"]["up"]).tolist())
print(json.dumps(found))
