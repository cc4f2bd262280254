"The commands of `attnnas data` from a clone of the repository: python -m data_prep --help."
import sys

from attnnas.cli.data import main

if __name__ == "__main__": sys.exit(main(program="data_prep"))
