from bench.fidelity.experiment import main

main()
