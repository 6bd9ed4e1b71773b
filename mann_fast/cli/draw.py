"""mann-fast draw: a page of your browser to teach a memory symbols of your own, and see what it makes of others."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import time
import webbrowser

from ..learner import FewShotLearner
from ._options import add_checkpoint, say_which_model
from ._signals import StopSignals

ORDERS = 32  # of the examples, as of mann-fast predict

EXAMPLE = """\
examples:
  mann-fast draw
  mann-fast draw --checkpoint runs/mine --port 8000 --no-browser

Needs gradio (pip install mann_fast[draw]) and no connection to anywhere. Ctrl-C ends it.
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "draw",
        help="teach it symbols that you draw, in your browser",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--host",
        metavar="NAME",
        default="localhost",
        help="who may open the page: localhost, this computer alone (default); 0.0.0.0, all of the network",
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=7860, help="0: any that is free (default: 7860)"
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    return parser


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that is free. ValueError where it is in use or there can be none."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be between 0 and 65535, got {port}")
    with socket.socket() as probe:
        if (
            os.name != "nt"
        ):  # where it would let two programs have one port; elsewhere it is: not in use, though a moment ago
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"--host {host} --port {port} cannot be used: {reason}; give another") from None
        return probe.getsockname()[1]


def run(args: argparse.Namespace) -> int:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # as it is imported it asks
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("mann-fast draw needs gradio: pip install mann_fast[draw]")
    from ._page import make_page

    port = free_port(args.host, args.port)
    # gradio asks its own server whether it is there, and must not ask a proxy.
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [excepted, "localhost", args.host]))
    say_which_model(args.checkpoint)
    learner = FewShotLearner.load(args.checkpoint, orders=ORDERS, encoder=args.encoder)
    if learner.config.model != "mann":
        raise ValueError(f"{args.checkpoint} is an LSTM, which has no memory to show")
    page, look = make_page(learner)
    with StopSignals() as stop:
        page.launch(
            server_name=args.host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            **look,
        )
        try:
            print(f"Open {page.local_url} (Ctrl-C ends it)", flush=True)
            if not args.no_browser:
                webbrowser.open(page.local_url)
            while not stop():
                time.sleep(0.2)
        finally:
            page.close(verbose=False)
    return stop.status
