module github.com/shoalfs/shoal/bench

go 1.26.0

require (
	github.com/shoalfs/shoal/integration v0.0.0
	github.com/spf13/cobra v1.10.2
	golang.org/x/sys v0.49.0
)

require (
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/moby/sys/mountinfo v0.7.3 // indirect
	github.com/spf13/pflag v1.0.10 // indirect
)

replace (
	github.com/shoalfs/shoal => ../
	github.com/shoalfs/shoal/integration => ../integration
)
