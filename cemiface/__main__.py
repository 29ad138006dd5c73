"The command line as a module: `python -m cemiface`, `accelerate launch -m cemiface`."
from cemiface.cli.app import main

main()
