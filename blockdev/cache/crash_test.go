package cache

const crashChildEnv = "SHOAL_CACHE_CRASH_CHILD"

func crashChild(string) {}
