from bench.gpu.measure import main

main()
