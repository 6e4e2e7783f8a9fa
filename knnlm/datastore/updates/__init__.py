"""Changing a domain that is built: documents added and removed, versions compacted, manifests revised."""
