// OpenKruise, for the CRD of its ImagePullJob alone. No package imports it, so
// `go mod tidy` would take it out.
module github.com/shoalfs/shoal/integration/tools/kruise

go 1.26

require github.com/openkruise/kruise v1.8.0
