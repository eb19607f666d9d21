"""The tests. Imported before torch, so what torch reads from the environment is set here."""

import os

# Simulated ranks end with collectives without a wait, since some results are not looked at.
# As the process ends, torch's C++ would warn of each rank's, below pytest's summary. What C++ warns
# of while Python runs is a Python warning, and so still an error in the tests.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
