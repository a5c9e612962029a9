// Package mirror is the registry mirror that a node serves on loopback, for the
// containerd of its machine: tags, manifests, image indexes and configs come from
// the supernode, so that registries see no more requests the more nodes there are,
// and images that are stored can be pulled while their registry is down.
//
// containerd names it in hosts.toml (docs/containerd.md has the file), and says with
// the query parameter ns which registry it means. The mirror answers with an error if
// it does not have what is requested (layers above all), or if the request fails:
// containerd then asks the next host, and after all hosts the registry itself, with its
// own credentials. So the mirror passes nothing through.
//
// It is also where a pull waits for an image that has to be opened first, since
// containerd holds no lock there: at the manifest it has the image opened (Opener),
// and it holds the config back until that is over. And it is where a pull shows
// what it may have: the mirror asks for a token, containerd gets it with the pull's
// credential or with none, and what that opens the registry is asked.
//
// # Invariants
//
//   - Bytes go out only after they were hashed against the digest that was asked
//     for, or that the answer to a tag names.
//   - A document is given, and an image opened, only on the registry's word for the
//     credential of the very pull that asks. Credentials are in memory alone, in no
//     log line and no error.
//   - Errors have the form of the OCI distribution specification. None is 429,
//     which containerd repeats at once. What says nothing about the image is 401
//     with a refused token, so that containerd shows what the registry says.
//   - Each wait ends: the mirror waits for the source for less than a second in a
//     pull, and holds a config back as long as Opener says, but never longer than
//     the config's client stays. Each has its bound on how many there are.
//   - A supernode that finds the mirror in the hosts.toml that it shares with
//     containerd is turned away (508), so that no request goes in circles.
package mirror
