//! Who is here and may be: identity and pairing, mDNS discovery, membership, control log, link and machine profiles.
