"""The options and the help of every command, a file of commands that belong together (torch-free).

Each command imports its work when it is called; ``launch/cli.py`` puts them together.
"""
