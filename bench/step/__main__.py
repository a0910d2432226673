from bench.step.measure import main

main()
