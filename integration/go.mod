module github.com/shoalfs/shoal/integration

go 1.26

require (
	github.com/moby/sys/mountinfo v0.7.3
	golang.org/x/sys v0.1.0
)

replace github.com/shoalfs/shoal => ../
