"""What setup.py looks for before it builds: build_tools.environment, .torch_here, .compiler and .cuda.

Whatever is missing or does not fit ends the build here, in one line that names it and its remedy, since what torch and
setuptools say of it later is a traceback. Nothing of this folder is installed.
"""
