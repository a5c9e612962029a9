package exchange

// StoreProvider is what a Server makes of ServerConfig.Chunks, for the suite, which cannot
// be imported from within the package.
func StoreProvider(c Chunks) Provider { return storeProvider{c} }
