"""`python -m flexmoe` is the command `flexmoe`."""

import signal


def run() -> None:
    """The command. Ctrl-C ends it quietly, also while its modules are imported, and on its way out."""
    try:
        from flexmoe.cli.main import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a command sets its own; behind it Python would write a traceback
    main(prog_name="flexmoe")


if __name__ == "__main__":
    run()
