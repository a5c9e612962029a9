package blockdev

// Origin says where the bytes of a chunk or of a read were. Origins are in the order of
// how far away that is.
type Origin uint8

const (
	FromLocal     Origin = iota // this node's disk
	FromPeer                    // another node
	FromSupernode               // a supernode
	FromRegistry                // a registry that this node has asked itself
	Origins                     // how many there are
)

// String is "local", "peer", "supernode" or "registry".
func (o Origin) String() string {
	return [Origins]string{"local", "peer", "supernode", "registry"}[o]
}
