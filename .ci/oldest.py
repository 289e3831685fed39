"""Prints the oldest runtime dependencies that pyproject.toml admits, as constraints for pip."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
for dependency in dependencies:
    bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", dependency)
    if bound is None:
        raise SystemExit(f"{dependency!r} in pyproject.toml must have the form 'name>=version'.")
    print(f"{bound[1]}=={bound[2]}")
