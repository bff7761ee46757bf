"""`python -m flexmoe` is the command `flexmoe`."""


def run() -> None:
    """The command. Ctrl-C while its modules are imported ends it as quietly as later."""
    try:
        from flexmoe.cli.main import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main(prog_name="flexmoe")


if __name__ == "__main__":
    run()
