"""Make the bundled models anew: `python assets/models/make.py` carries out the stages of `run.toml`, one by one.

Renders, checkpoints and models go into `runs`. What was stopped goes on when it is started again; finished stages train
no more. A stage that fails ends the program, with an exit status that says so. Under torchrun every stage is shared out
among the processes: `torchrun --nproc-per-node=8 assets/models/make.py --workers 8`.
"""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from minisd.config import CRITTERS_512, ModelConfig
from minisd.critters.stages import carry_out, read_stages
from minisd.train.loop import start_processes

RUN = Path(__file__).parent / "run.toml"


def main(arguments: Sequence[str] | None = None, preset: ModelConfig = CRITTERS_512) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=RUN, help="the run file; by default the one beside this")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where all goes; by default: runs")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="carry out these stages alone, in the file's order")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches, for a GPU; by default: 0")
    options = parser.parse_args(arguments)

    stages = read_stages(options.run)
    if unknown := set(options.only or []) - {stage.recipe for stage in stages}:
        parser.error(f"{options.run} has no stage {', '.join(sorted(unknown))}")
    if options.only:
        stages = [stage for stage in stages if stage.recipe in options.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a checkpoint is written first
    carry_out(stages, options.folder, start_processes(), options.workers, preset)


if __name__ == "__main__":
    main()
