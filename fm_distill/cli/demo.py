"""The command `fm-distill demo`."""

import dataclasses
import pathlib

from fm_distill.cli.command import first, first_run
from fm_distill.errors import EXIT_COMPLETE, UserError
from fm_distill.preparation.parse_options import OverConfig, parse_over


@dataclasses.dataclass(frozen=True)
class _Demo(OverConfig):
    """A page on this machine: drop images, and see student and teacher side by side."""

    port: int = 8765
    """Port of the loopback address; 0 takes a free one."""


def demo_command(arguments: list[str]) -> int:
    from fm_distill.config.serialization import refuse_other_config
    from fm_distill.evaluation.demo import judges, warm_up
    from fm_distill.evaluation.demo_server import LOOPBACK, make_server
    from fm_distill.evaluation.evaluate_file import config_in
    from fm_distill.exporting.formats import FORMATS
    from fm_distill.system.console import COMPILING, log

    if arguments and pathlib.Path(arguments[0]).suffix == ".safetensors":
        raise UserError(
            f"{arguments[0]} holds weights only; give the run that it was exported from, or an "
            f"export of the whole function ({', '.join(FORMATS)})"
        )
    if arguments and pathlib.Path(arguments[0]).suffix in FORMATS:
        path, remaining = first(arguments, "demo FILE")
        stored = config_in(path)
    else:
        path, stored, remaining = first_run(arguments, "demo DIR|FILE")
    options = parse_over(_Demo, stored, remaining, f"demo {path}")
    refuse_other_config(stored, options.config, f"the run of {path}")
    networks = judges(path, options.config)
    with make_server(networks, options.port) as server:
        log(COMPILING)
        for network in networks:
            warm_up(network)
        print(f"http://{LOOPBACK}:{server.server_port}/", flush=True)
        log("open this page in a browser; Ctrl-C stops the server")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log("closed")
    return EXIT_COMPLETE
