"""What setup.py needs to drive CMake."""
