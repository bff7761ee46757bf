"""`python -m flexmoe` is the command `flexmoe`."""

from flexmoe.cli.main import main

if __name__ == "__main__":
    main(prog_name="flexmoe")
