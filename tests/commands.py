"""Calls the command line in this process."""
from attnnas.cli import main as cli


def attnnas(capsys, *arguments):
    "(exit code, output, error lines) of a call in this process."
    code = cli.main([str(a) for a in arguments])
    found = capsys.readouterr()
    return code, found.out, found.err
