"""How fast is it here? python scripts/benchmark.py [suite=layers|step|data|end_to_end|memory|gpu|all] [quick=true].

Every row beside its baselines, interleaved, with spread; writes CSV, JSON, a picture and a Markdown table.
"""

from alexnet.bench.config import Benchmark
from alexnet.bench.results import benchmark
from alexnet.cli import command


@command("benchmark", Benchmark)
def main(config: Benchmark) -> None:
    benchmark(config)


if __name__ == "__main__":
    main()
