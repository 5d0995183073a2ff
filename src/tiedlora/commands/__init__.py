"""The commands: `tiedlora NAME ...`, which are also the files in scripts/ and train.py. One module each.

`main(words)` of a module takes the words of its command line. A command reads them, calls the packages below, and
prints. What takes seconds to import is imported when it is needed: --help and a wrong word do not need it.
"""
