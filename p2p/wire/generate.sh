#!/bin/sh
# Generates *.pb.go. Needs protoc (Debian: protobuf-compiler). protoc-gen-go is
# built from the version of google.golang.org/protobuf that go.mod pins, so
# generated code and runtime always fit. Files are named by their path from the
# top: names are global to a program, and another module may have a file of that name.
set -eu
cd "$(dirname "$0")/../.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
go build -o "$tools/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
PATH="$tools:$PATH" protoc --go_out=. --go_opt=paths=source_relative p2p/wire/*.proto
