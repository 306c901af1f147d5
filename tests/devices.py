"""Runs checks in a process of its own that has eight devices: JAX's CPU backend can be split only before it starts."""

import importlib
import json
import os
import subprocess
import sys
import traceback

import jax
from jax.sharding import AxisType

DEVICES = 8


def mesh_of(model, data=1, types=AxisType.Auto):
    """A mesh of some of the devices, with a data and a model axis."""
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(types,) * 2, devices=jax.devices()[: data * model]
    )


def outcomes(module, environment=None, names=None):
    """Runs ``check_*`` functions of a test module, those of some names or all; what each raised, or "".

    ``environment`` has further variables for the process, set before it imports JAX.
    """
    names = checks(module) if names is None else names
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, "-c", f"import devices; devices.run_checks({module!r}, {names!r})"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        | {"PYTHONPATH": os.pathsep.join(sys.path)}
        | (environment or {}),
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(last[-1])


def checks(module):
    """Names of the checks of a module."""
    return [name for name in vars(sys.modules[module]) if name.startswith("check_")]


def asked_for(request):
    """Names of the checks whose tests are to be run, in the module of a fixture's request."""
    mine = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return [item.callspec.params["name"] for item in mine if "name" in item.callspec.params]


def run_checks(module, names):
    """In the process of its own: prints what each check raised."""
    loaded = importlib.import_module(module)
    found = {}
    for name in names:
        try:
            getattr(loaded, name)()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
