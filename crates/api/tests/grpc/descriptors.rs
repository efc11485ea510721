//! The contract as data: every method of the services, and the fields of their requests.

use anyhow::{Context as _, Result};
use mlxnode_api::rpc::RPCS;
use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorSet};
use std::collections::{BTreeMap, BTreeSet};

/// A method and its request.
#[derive(Clone, Debug)]
pub(crate) struct Method {
    /// `/package.Service/Method`
    pub(crate) path: String,
    /// Full name of the request's message, without the dot in front.
    pub(crate) input: String,
}

/// All services that are public, and all messages by full name.
pub(crate) fn contract() -> Result<(Vec<Method>, BTreeMap<String, DescriptorProto>)> {
    let (mut methods, mut messages) = (Vec::new(), BTreeMap::new());
    let sets = [
        mlxnode_proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    for set in sets {
        for file in FileDescriptorSet::decode(set)?.file {
            let package = file.package().to_owned();
            if package.contains(".internal.") {
                continue;
            }
            for service in &file.service {
                for method in &service.method {
                    methods.push(Method {
                        path: format!("/{package}.{}/{}", service.name(), method.name()),
                        input: method.input_type().trim_start_matches('.').to_owned(),
                    });
                }
            }
            for message in file.message_type {
                add(&package, message, &mut messages);
            }
        }
    }
    Ok((methods, messages))
}

fn add(prefix: &str, message: DescriptorProto, messages: &mut BTreeMap<String, DescriptorProto>) {
    let name = format!("{prefix}.{}", message.name());
    for nested in &message.nested_type {
        add(&name, nested.clone(), messages);
    }
    messages.insert(name, message);
}

/// A method that is added to a service without a line in the table of what keys may do is found here.
#[test]
fn every_method_says_who_may_call_it() -> Result<()> {
    let (methods, messages) = contract()?;
    let served: BTreeSet<&str> = methods.iter().map(|method| method.path.as_str()).collect();
    let listed: BTreeSet<&str> = RPCS.iter().map(|rpc| rpc.path).collect();
    assert_eq!(served, listed);
    assert_eq!(listed.len(), RPCS.len(), "no method is listed twice");
    for method in &methods {
        messages.get(&method.input).with_context(|| format!("{} of {}", method.input, method.path))?;
    }
    Ok(())
}
