"""Settings of the whole suite."""

import os

# The suite compiles many small programs and runs each once: let XLA's CPU backend compile quickly (about three times)
# rather than well. Appended to, so that a value set outside still holds; HIRE_TEST_OPTIMISED=1 leaves XLA as users have it.
if os.environ.get("HIRE_TEST_OPTIMISED", "0") != "1":
    _QUICK = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    )
    os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
