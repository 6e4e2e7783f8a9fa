"""Which packages a wheel has; the rest is in pyproject.toml.

The services are a package called `services` in the repository. A wheel puts it below `knnlm_servers`, so that it does
not lie among other people's packages under so common a name; `knnlm serve` shows it to the processes that it starts.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["knnlm", "knnlm.*"]),
        *(f"knnlm_servers.{name}" for name in find_packages(include=["services", "services.*"])),
    ],
    package_dir={"knnlm_servers.services": "services"},
)
