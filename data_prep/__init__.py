"Preparation of data sets from the command line: python -m data_prep --help."
