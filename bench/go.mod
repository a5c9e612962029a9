module github.com/shoalfs/shoal/bench

go 1.26.0

require (
	github.com/shoalfs/shoal v0.0.0
	github.com/shoalfs/shoal/integration v0.0.0
)

require (
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/spf13/cobra v1.10.2 // indirect
	github.com/spf13/pflag v1.0.10 // indirect
)

replace (
	github.com/shoalfs/shoal => ../
	github.com/shoalfs/shoal/integration => ../integration
)
